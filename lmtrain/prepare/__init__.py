"""`lmtrain prepare`: raw text to a corpus that pretraining reads, by datatrove's blocks and executors (run.py).

A room of its own above data: it reads evaluation rows (eval, tasks) to keep them out, and lets a run write
text (runs, engine). What it writes is opened by data/prepared.py, which knows nothing of datatrove.

FOLDER/settings.json   what decides the result; another command with others is refused
FOLDER/tokenizer/      FOLDER/shards/      FOLDER/manifest.json      what training reads
FOLDER/inputs.jsonl    path and bytes of every file
FOLDER/synthetic/      documents that a run has written
FOLDER/logs/STAGE/     datatrove's: completions, stats, logs
FOLDER/scratch/           gone at the end
"""
