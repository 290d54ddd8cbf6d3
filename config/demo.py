# CoMiGS-1G1S on text that every machine has: four users, the small base that ships with the project, two CPU cores.
dataset = 'demo'
init_from = 'assets/base-tiny.safetensors'
out_dir = 'out/demo'
block_size = 256        # bytes; the base's whole context
batch_size = 4          # x 256 = 1024 bytes a step
micro_batch_size = 4
