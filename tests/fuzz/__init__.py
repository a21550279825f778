"""Random attention programs: a specification, the model it stands for, a reference cut by hand, and a trial of both."""
