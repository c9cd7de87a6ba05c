"""Training MOSS: full fine-tuning, adapters, continued pre-training.

data (records, encoding)  conversations and texts to token ids and labels, kept between runs
batches                   which samples a step takes, in flat passes without padding
parameters, optimizer, schedule   what is trained, in flat memory; AdamW; the learning rate
trainer                   the loop; checkpoint: stop and go on; log: TensorBoard and JSON lines
start, export             from a folder, or from nothing; back to a folder
"""
