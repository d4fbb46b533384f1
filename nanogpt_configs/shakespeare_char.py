# A character model of the size of nanoGPT's Shakespeare example: 10.6M parameters; minutes on a GPU, as nanoGPT says.
# Any text will do; with Shakespeare's in input.txt:
#
#     python -m sparse_coding train-lm nanogpt_configs/shakespeare_char.py --text input.txt --tokenizer char \
#         --out outputs/shakespeare-char
#
# or from tokens that nanoGPT or prepare-text wrote into data/shakespeare_char: leave --text and --tokenizer out.
out_dir = "outputs/shakespeare-char"
dataset = "shakespeare_char"

# the model
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256  # characters
dropout = 0.2  # a megabyte of text is soon known by heart

# the training
batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 5000
lr_decay_iters = 5000
beta2 = 0.99  # few tokens per update
eval_interval = 250  # it overfits: the best weights are kept
eval_iters = 200
log_interval = 10
