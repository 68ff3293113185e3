"""`fanlight up`: all of Fanlight on one machine, as processes that are kept alive and taken along at the end."""
