"""The operations as a loop over tokens, to be read and trusted; any dtype, any device, slow."""
