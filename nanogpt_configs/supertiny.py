# The "supertiny" GPT of the 2023 sparse-coding work: small enough to know every neuron, deep enough to have circuits.
# Published on OpenWebText with GPT-2's tokenizer (50257 tokens): .83M parameters, 97% of them the embedding.
#
#     python -m sparse_coding train-lm nanogpt_configs/supertiny.py --text Skylion007/openwebtext --tokenizer gpt2 \
#         --out outputs/supertiny
#
# 600,000 updates of 16,384 tokens are about one pass over OpenWebText. A first look takes minutes on a laptop:
#
#     python -m sparse_coding train-lm nanogpt_configs/supertiny.py --text python-docs --out outputs/supertiny \
#         --set max_iters=2000 warmup_iters=100 batch_size=32 eval_interval=500 eval_iters=10
import time

wandb_project = "sparsecode"
wandb_run_name = "supertiny-" + str(time.time())

# the model
n_layer = 6  # as many as nanoGPT's Shakespeare model
n_embd = 16  # the residual stream; the MLPs are 4 * 16 = 64 wide
n_head = 8  # must divide n_embd: heads of width 2
dropout = 0.2  # as nanoGPT's Shakespeare model
block_size = 256  # a quarter of GPT-2's context, for speed
bias = False  # nanoGPT's default

# the training: nanoGPT's for GPT-2, except for the batch
batch_size = 64
gradient_accumulation_steps = 1  # nanoGPT's 5 * 8 is for eight GPUs and a model 150 times as large
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
max_iters = 600000  # lr_decay_iters is left out: the cosine ends with the training
weight_decay = 1e-1
eval_interval = 1000
eval_iters = 20  # nanoGPT has 200: minutes for each evaluation on a laptop
log_interval = 10
