# StackExchange, GitHub, arXiv and books, in domain (paper Table 1, right).
# 50 rounds x 10 steps x 64 x 128 tokens = 4.1 M tokens a user, four passes over its 1 M.
dataset = 'slimpajama'
out_dir = 'out/slimpajama'
rounds = 50
