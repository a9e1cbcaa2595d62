"""Engines beyond this process: starting, watching and restarting them. Of the frontend it knows only `client`."""
