"""From words to arrays: tokens, and the conditioning that text encoders and time ids make."""
