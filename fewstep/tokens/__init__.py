"""All of autoregressive models: networks, tokenizers, codes, students, pipelines, published checkpoints."""
