"""The moves of the state machine in ``tests/continual/test_state_machine.py``, by subject.

``story.py`` has what all moves share: the model, what is expected of it, and the promise. Each other file has a class
of rules, which the machine inherits. A move either leaves every finished task as it was, or it is a *hazard*: then a
call has to raise an error that names what has changed, and the story goes on from a state that was saved before.
"""
