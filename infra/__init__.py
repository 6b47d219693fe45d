"""How Gristmill is deployed, and the hardware table that its estimates come from."""
