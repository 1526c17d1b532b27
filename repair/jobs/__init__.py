"""A durable job: a folder of JSON files, a supervisor, and a worker process.

Only `worker.py` imports the pipeline, and with it torch; everything else here reads and
writes small JSON files, so that the web process and the command line stay light.
"""
