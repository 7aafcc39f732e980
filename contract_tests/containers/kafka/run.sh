#!/bin/sh
# Starts one broker as the official image does: the mounted properties, overridden by KAFKA_... of the environment.
set -e
: "${JAVA_FLAGS:=-XX:AOTCache=/opt/kafka/kafka.aot}"
: "${PROPERTIES:=/mnt/shared/config/server.properties}"
cp "$PROPERTIES" /tmp/server.properties
env | sed -n 's/^KAFKA_\([A-Z_]*\)=/\1=/p' | while IFS='=' read -r name value; do
    echo "$(echo "$name" | tr 'A-Z_' 'a-z.')=$value"
done >> /tmp/server.properties
logs=$(sed -n 's/^log.dirs=//p' /tmp/server.properties)
[ -f "$logs/meta.properties" ] || cp -r /opt/kafka/formatted "$logs"
exec java -Xms128m -Xmx256m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Dlog4j2.configurationFile=/opt/kafka/log4j2.yaml \
    $JAVA_FLAGS -cp '/opt/kafka/libs/*' kafka.Kafka /tmp/server.properties
