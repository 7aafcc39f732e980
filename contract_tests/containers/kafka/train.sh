#!/bin/sh
# While building: boot once, end politely, keep what the JVM recorded and nothing else.
set -e
PROPERTIES=/opt/kafka/train.properties JAVA_FLAGS=-XX:AOTCacheOutput=/opt/kafka/kafka.aot /opt/kafka/run.sh >/tmp/log 2>&1 &
tries=0
until grep -q 'Kafka Server started' /tmp/log; do
    sleep 0.2
    tries=$((tries + 1))
    [ $tries -lt 300 ] || { cat /tmp/log; exit 1; }
done
sleep 1
kill -TERM $!
wait $! || true
[ -s /opt/kafka/kafka.aot ] || { cat /tmp/log; exit 1; }
rm -rf /tmp/log /tmp/server.properties /tmp/kafka-logs
