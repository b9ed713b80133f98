"""Pictures and sounds: encoders, projectors, features."""
