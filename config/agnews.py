# AG News, out of domain: a user trains on one category and is tested on all four (paper Table 1, left).
# 20 rounds x 10 steps x 64 x 128 tokens = 1.6 M tokens a user, about two passes over its 0.8 M.
dataset = 'agnews'
out_dir = 'out/agnews'
rounds = 20
