# SlimPajama with a number of experts per user (paper Table 2): one generalist, the rest specialists, top 2 per token.
dataset = 'slimpajama'
out_dir = 'out/slimpajama_1gxs'
rounds = 50
method = 'comigs_1gxs'
n_experts = (2, 4, 4, 2)  # the paper's other row is 4,2,2,4
