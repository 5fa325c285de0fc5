"""Many pictures: plans of requests, microbatches on all devices, folders that resume."""
