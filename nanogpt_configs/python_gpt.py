# The smaller bundled model: .66M parameters that have read Python's manual and standard library, trained in minutes.
#
#     python -m sparse_coding train-lm nanogpt_configs/python_gpt.py --text python-docs --out outputs/python-gpt
#
# It exists so that everything runs offline and at once: large enough to leave counting far behind, small enough to be
# kept with the code. Its MLPs are 4 * 96 = 384 wide.

# the model
n_layer = 4
n_head = 4
n_embd = 96
block_size = 128  # about 400 characters; longer contexts cost attention and teach a model this small little
bias = True  # as GPT-2
dropout = 0.0  # the text is read a few times only

# the training: small batches and a high peak, for the most learning from few tokens
batch_size = 32
gradient_accumulation_steps = 1
learning_rate = 3e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 3000  # 12M tokens, five times the text
beta2 = 0.99  # a longer memory, since a batch is only 4,096 tokens
weight_decay = 1e-1
eval_interval = 500
eval_iters = 20
log_interval = 20
