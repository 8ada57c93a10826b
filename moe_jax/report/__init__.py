"""One HTML page that shows what a run's routers do."""
