"""Who asks: authentication, JWT, throttling of failed attempts."""
