"""Tasks, data and a plain model: everything that needs no teacher."""
