"""Messages and rows to tokens through the tokenizer's chat template, and the loss masks over them."""
