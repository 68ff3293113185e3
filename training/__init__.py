"""How the starter model was made: data, training stages, export and evaluation. Nothing in Fanlight imports this."""
