"""Many pictures: plans of requests, folders that resume."""
