# Four users (Python, C++, reference prose, READMEs) on text that every machine has, with the small base that ships here.
# 10 rounds x 10 steps x 4 x 256 bytes = 102 kB a user: one and a third to two and a half passes over its 40 to 80 kB.
dataset = 'demo'
init_from = 'assets/base-tiny.safetensors'
out_dir = 'out/demo'
rounds = 10
block_size = 256  # bytes; the base's whole context
batch_size = 4
micro_batch_size = 4
eval_every = 5
judge_windows = 16  # for methods where users judge models: in the proportion of the batch to the paper's 64
