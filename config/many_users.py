# 1,000 users, of whom 20 take part in a round, on text that every machine has. Once before:
#   python data/prepare.py demo --users=1000 --alpha=0.3 --name=many --train_tokens=4000 --valid_tokens=1000 --test_tokens=1000
# Every user has its own mixture of the four kinds (Dirichlet, alpha 0.3) and 4 kB of text: little to learn from alone.
dataset = 'many'
init_from = 'assets/base-tiny.safetensors'
out_dir = 'out/many'
participation = 0.02
test_users = 50  # a sample: testing all 1,000 would take longer than training
rounds = 20
router_every = 10  # with every participation, because a user comes round once in 50 rounds
router_steps = 3
batch_size = 4
micro_batch_size = 4
eval_every = 20
judge_windows = 16
