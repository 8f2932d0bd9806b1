"""The files of a run.

- ``names``: the names of its files and folders
- ``workdir``: the folder of a run: its layout, which runs may use it, and reading its weights
- ``config_file``: ``config.json``, fields that were added later, and what makes two configs the same run
- ``user_code``: the digests of the user's own modules, and which of them have changed since a run was made
- ``checkpoints``: checkpoints with digests
- ``progress``: the progress bar, ``metrics.jsonl`` and TensorBoard
- ``trackers``: Weights & Biases and trackio
- ``unfinished``: the state of an interrupted evaluation
- ``evaluated``: the folder of an evaluation: which evaluations may use it
- ``buckets``: files and folders in buckets, and their copies on this machine
- ``mirror``: a folder in a bucket as the folder of a job
- ``lock``: one job per folder
- ``files``: writing a file whole or not at all
"""
