# The 32-wide sister of supertiny.py, the shape of the checkpoints that the 2023 work used in the end: wider heads, no
# dropout. 1.7M parameters with GPT-2's tokenizer, 95% of them the embedding.
#
#     python -m sparse_coding train-lm nanogpt_configs/supertiny_32.py --text Skylion007/openwebtext --tokenizer gpt2 \
#         --out outputs/supertiny-32
import time

wandb_project = "sparsecode"
wandb_run_name = "supertiny-32-" + str(time.time())

# the model
n_layer = 6
n_embd = 32  # the MLPs are 4 * 32 = 128 wide
n_head = 4  # heads of width 8
dropout = 0.0
block_size = 256
bias = False

# the training: that of supertiny.py
batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 2000
max_iters = 70000  # the later of the two published checkpoints, of a run that was to be longer
weight_decay = 1e-1
eval_interval = 1000
eval_iters = 20
log_interval = 10
