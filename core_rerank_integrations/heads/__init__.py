"""Head sets: the heads to read, and how their attention becomes a ranking.

head_set.py         heads of one model, with weights and provenance
scoring_config.py   prompts, calibration, abstention, weight of the first stage
formats.py          head set files of this package and of other projects
shipped.py          the head sets inside this package
"""
