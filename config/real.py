# The demo's four users with a real pretrained base, SmolLM2-135M, and its words instead of bytes. `make real` does it all:
#   python data/base.py smollm2
#   python data/prepare.py demo --name=real --tokenizer=bases/smollm2 \
#       --train_tokens=12000 --valid_tokens=3000 --test_tokens=3000
# 4 rounds x 7 steps x 2 x 128 tokens = 7,168 tokens a user, three fifths of its text.
dataset = 'real'
init_from = 'bases/smollm2'
out_dir = 'out/real'
rounds = 4
local_steps = 7
router_every = 14
router_steps = 7
batch_size = 2
micro_batch_size = 2
eval_every = 2
judge_windows = 16  # for methods where users judge models
