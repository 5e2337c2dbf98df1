"""Stepwise DPO (sDPO): the result of each step is the reference of the next."""
