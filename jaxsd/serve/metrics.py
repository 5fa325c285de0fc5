"""What the server counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server, in a registry of their own; every method of theirs is thread-safe."""

    def __init__(self):
        self.registry = registry = CollectorRegistry()

        def histogram(name, text, buckets):
            return Histogram(f'jaxsd_{name}', text, buckets=buckets, registry=registry)

        self.requests = Counter('jaxsd_requests', 'Requests answered.', ['route', 'status'],
                                registry=registry)
        self.outcomes = Counter(
            'jaxsd_pictures', 'Pictures: made; failed; cancelled: their requests had gone; shared: '
            'asked for while the same one was on its way.', ['outcome'], registry=registry)
        for outcome in ('made', 'failed', 'cancelled', 'shared'):
            self.outcomes.labels(outcome)
        self.queue = Gauge('jaxsd_queue_pictures', 'Pictures that wait.', registry=registry)
        self.running = Gauge('jaxsd_running_pictures', 'Pictures being made.', registry=registry)
        self.queueing = histogram('queueing_seconds', 'From a picture\'s arrival to its slot.',
                                  SECONDS)
        self.making = histogram('making_seconds', 'That a picture had a slot.', SECONDS)
        self.answering = histogram('request_seconds', 'From a request to its answer.', SECONDS)
