# The larger bundled model, which run.py takes by default: a GPT of 1.7M parameters that has read Python's manual and
# standard library, trained in 37 minutes on two cores that had other work.
#
#     python -m sparse_coding train-lm nanogpt_configs/python_gpt_large.py --text python-docs --vocab-size 4096 \
#         --out outputs/python-gpt-large
#
# Twice the vocabulary, half as many layers again and a third wider than python_gpt.py: its words are whole more often,
# and its MLPs have 4 * 128 = 512 hidden units.

# the model
n_layer = 6
n_head = 4
n_embd = 128
block_size = 128  # about 450 characters
bias = True  # as GPT-2
dropout = 0.1  # the text is read nine times

# the training
batch_size = 32
gradient_accumulation_steps = 1
learning_rate = 2e-3
min_lr = 1e-4
warmup_iters = 100
max_iters = 5000  # 20M tokens
beta2 = 0.99  # a longer memory, since a batch is only 4,096 tokens
weight_decay = 1e-1
eval_interval = 500
eval_iters = 20
log_interval = 20
