"""Hugging Face's forms: names of weights, config.json and tokenizers, as tables read in both directions."""
