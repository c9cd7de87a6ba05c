"""How moss-tiny, the small model inside moss-jt, is made: its data, its tokenizer, its evaluation."""
