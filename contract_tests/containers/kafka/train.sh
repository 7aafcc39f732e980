#!/bin/sh
# While building: format a log directory, boot once, end politely, keep what the JVM recorded and the fresh directory.
set -e
export PROPERTIES=/opt/kafka/train.properties
java -cp '/opt/kafka/libs/*' kafka.tools.StorageTool format -t MkU3OEVBNTcwNTJENDM2Qk -c $PROPERTIES
mv "$(sed -n 's/^log.dirs=//p' $PROPERTIES)" /opt/kafka/formatted
JAVA_FLAGS=-XX:AOTCacheOutput=/opt/kafka/kafka.aot /opt/kafka/run.sh >/tmp/log 2>&1 &
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
