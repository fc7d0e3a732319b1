"""Jobs over a whole patch set or folder, resumed row by row; with shards, parallel batches and memory limits."""
