"""Work over a whole patch set or folder, resumed row by row: attack, purify, predict; shards, parallel batches, memory."""
