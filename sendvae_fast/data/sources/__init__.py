"""Sources of encoded pictures: folders, WebDataset tar shards, Hugging Face parquet files."""
