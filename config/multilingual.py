# Wikipedia in German, Dutch, French and Italian, in domain: every user is tested on its own language (paper Table 1, middle).
# 20 rounds x 10 steps x 64 x 128 tokens = 1.6 M tokens a user, three to four passes over its 0.4-0.6 M.
dataset = 'multilingual'
out_dir = 'out/multilingual'
rounds = 20
