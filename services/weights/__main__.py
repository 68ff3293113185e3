"""`python -m services.weights`: the same commands as `fanlight weights`."""

from services.weights.cli import app

if __name__ == "__main__":
    app()
