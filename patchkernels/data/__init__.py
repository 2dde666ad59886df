"""From text to the batches of a step: sources, tokenizer, cached corpus, batches; and a corpus in one Parquet file."""
