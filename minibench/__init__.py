"""MiniBench: pictures drawn on the fly, questions about them, and the small LLaVA that is trained and tested on them.

scenes.py -> questions.py -> tasks.py -> data.py    -> pretrain.py (with processor.py, tower.py, optimizer.py)
                                     -> evaluate.py (with scoring.py)
"""
