"""MiniBench: a benchmark for very small vision-language models, drawn on the fly.

    scenes.py -> questions.py -> tasks.py -> data.py      rows to train on, items to test with
                                     |          |
                                     |       files.py     both as files; export.py is its command
                                  scoring.py              replies -> scores

It imports nothing of the rest of the project.
"""
