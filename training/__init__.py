"""How the starter model was made: data, training, export, evaluation. Nothing in Fanlight imports this."""
