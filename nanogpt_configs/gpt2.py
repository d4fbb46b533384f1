# GPT-2 small, 124M parameters, on OpenWebText: nanoGPT's recipe for eight GPUs, to a loss of about 2.85.
#
#     python -m sparse_coding prepare-text --text Skylion007/openwebtext --tokenizer gpt2 --held-out 0.0005 \
#         --out data/openwebtext
#     torchrun --standalone --nproc_per_node=8 -m sparse_coding train-lm nanogpt_configs/gpt2.py --out outputs/gpt2-124m
#
# The batch is the same on one GPU: it makes the passes that eight would share.
wandb_project = "owt"
wandb_run_name = "gpt2-124M"
dataset = "openwebtext"

# the model: nanoGPT's defaults
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024
bias = False
dropout = 0.0

# the training: 12 windows * 1024 tokens * 40 passes = 491,520 tokens per update, 300B in all
batch_size = 12
gradient_accumulation_steps = 5 * 8
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
max_iters = 600000
lr_decay_iters = 600000
weight_decay = 1e-1
compile = True
eval_interval = 1000
eval_iters = 200
log_interval = 10
