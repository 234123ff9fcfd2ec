"""Where encoded pictures lie: folders, WebDataset tar shards, Hugging Face parquet files."""
