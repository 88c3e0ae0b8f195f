"""Small models of the packages that people use, and the check that each of them keeps its tasks.

``zoo.py`` has the table of models, ``builders.py`` what its lines are made of, and ``check.py`` the check. The models
of ``small_*.py`` are made from classes, because their functions take no sizes.
"""
