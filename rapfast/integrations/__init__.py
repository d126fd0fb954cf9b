"""rapfast inside other projects' own classes. Nothing here imports those projects."""
