# The demo's four users with a real pretrained base, SmolLM2-135M, and its words instead of bytes. `make real` does it all:
#   python data/base.py smollm2
#   python data/prepare.py demo --name=real --tokenizer=bases/smollm2 \
#       --train_tokens=12000 --valid_tokens=6000 --test_tokens=6000
dataset = 'real'
init_from = 'bases/smollm2'
out_dir = 'out/real'
rounds = 6
batch_size = 2
micro_batch_size = 2
router_every = 20
eval_every = 3
