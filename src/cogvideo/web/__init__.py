"""Pages for a browser on this machine, and the servers behind them."""
