"""How much memory a run will take, told from the model's `config.json` alone."""
